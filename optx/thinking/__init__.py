"""Language models that reason with mixtures of tokens, and the policy gradient that trains them."""
