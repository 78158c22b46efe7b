"""`deit-fast export`: a student in the formats of other programs."""
