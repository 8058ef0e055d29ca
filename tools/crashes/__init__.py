"""Commands killed at chosen instants: `program` runs them, `instants` kills them."""
