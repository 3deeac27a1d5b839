"""The best budget under a limit: which graphs to look at, and which of them no other beats. No torch here."""
