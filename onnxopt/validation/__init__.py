"""The verdict: does a candidate compute what its reference computes?"""
