"""The custom resources as typed models, and the YAML generated from them."""
