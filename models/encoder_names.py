"""Names of an encoder's modules in transformers. They cost no import, so adapters can be read by them."""

PATHS = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "o_proj": "attention.output.dense",
    "up_proj": "intermediate.dense",
    "down_proj": "output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_norm": "output.LayerNorm",
}
"""Where a layer has its modules and norms, by our names."""

CLASSIFIER = "classifier"
"""Module that is the classification head."""
