"""Many pictures, in shards of a fixed range of sample ids each: by one process or many, and nothing lost."""
