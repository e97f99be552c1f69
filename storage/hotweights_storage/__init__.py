"""Where a checkpoint's bytes come from and lie: sources, readers, slabs, images in memory. Imports
the planner; knows no peer.
"""
