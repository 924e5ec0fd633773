"""Use cases over the three stores."""
