"""One model over several ranks: matrices cut by heads and by columns of the MLP, the vocabulary cut for embedding and head."""
