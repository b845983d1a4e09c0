"""What real exporters make of small models of many architectures, split and checked: `make exporters`."""
