"""Whether a version fits the model that runs, and what of the model it changes: asked before
anything is touched.
"""
