"""Tables of the documents, made from the files under results/."""
