"""What to split over which mesh axes, at what price, under which constraints."""
