"""The channel engine: what is known about channels, which belong together, what may go.

    facts     forward: which channels are zero, constant, independent of the input
    demand    backward: which channels nothing depends on
    groups    channels that can only go together, over (value, axis) slots
    removal   what may go, what makes up for it, and the edit that takes it out

One small rule per operator (`rules/`) answers all four questions; an operator without a
rule is a barrier, with that as its reason.
"""
