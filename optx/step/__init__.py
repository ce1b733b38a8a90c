"""What `optx.wrap` is made of: a step of any optimizer, with transforms in it."""
