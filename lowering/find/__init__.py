"""Questions asked of a captured graph: which attentions, which states, how they are written."""
