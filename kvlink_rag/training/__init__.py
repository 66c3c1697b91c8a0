"""Fine-tuning any supported model to KVLink (arXiv 2502.16002, section 3.3), the paper's recipe.

    config → model with link tokens → rows → samples → packed batches → transformers' Trainer

The mask comes from the same `layout` and `sees` as inference.
"""
