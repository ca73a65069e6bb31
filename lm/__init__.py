"""`lm`: language-model research in JAX. Imports nothing, so that experiment files load fast."""
