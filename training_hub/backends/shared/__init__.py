"""What the runs of every engine have in common: no tensor library is known here."""
