"""A view as a pure function of recipe, seed, sample and view number; the order of views."""
