"""The bottom floor: small things that every other package needs, each in one place. It knows the
standard library and nothing of ours.
"""
