"""Whether the inference can be believed."""
