"""The parts of pairs: networks, likelihoods, posteriors, priors and flows."""
