"""What a model will do on cards that are not here: its costs, a device file, the product's scheduler and a clock."""
