"""A view as a pure function of settings, sample and view number; the order of views."""
