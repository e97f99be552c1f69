"""The second model beside the running one, into which a rank loads the next version: how it is made
without memory (`skeleton`, `pristine`), asked (`tracing`), filled (`model`, `materials`) and held
against the running one (`changes`).
"""
