"""Learning from a teacher's features: statistics, normalisers, losses, the student's tokens."""
