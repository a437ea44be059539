"""Tables, pictures and a page of what benchmarks recorded: `diffkern bench report`."""
