"""Models: a class for each graphical model; variants of one are arguments."""
