"""What CLP is compared with."""
