"""What all readers of other tools' formats share."""
