"""What the seven scripts of the chapter share."""
