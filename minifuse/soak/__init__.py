"""A soak: random requests one after the other, and whatever is wrong with answers or left over."""
