"""Documents from files, tables, modules and the hub, and the token sequences made from them.

    read_source        source -> documents of one kind: text, completions or conversations
    document           the kinds, and training and held-out documents without overlap
    tokenization       documents -> tokens, each with whether it counts in the loss
    sequences          tokens -> sequences of equal length
    prepared_data      all of it for one model's tokenizer, with the counts

Importing this package imports neither torch nor transformers.
"""
