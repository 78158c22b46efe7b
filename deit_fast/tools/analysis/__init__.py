"""What distillation did to a student: its two tokens and heads, its teacher, what it looks at.

``analysis.runs.analyze`` does it; importing this package alone imports nothing heavy.
"""

from __future__ import annotations
