"""`analyze`: tokens, heads, calibration, disagreement and attention of students; their teacher."""
