"""A page in a browser that shows the latents of a pair, datum by datum."""
