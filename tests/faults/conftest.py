"""The samples of the cluster's tests."""

from tests.cluster.conftest import samples

__all__ = ["samples"]
