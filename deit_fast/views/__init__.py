"""A view as a pure function of settings, seed, sample and view number; the order of views."""
