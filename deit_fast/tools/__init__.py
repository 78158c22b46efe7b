"""Verbs built on top of the engine. The engine imports none of them."""
