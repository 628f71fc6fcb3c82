"""Another package's parts, installed for all tests of a module."""

import pytest
from own_package import install

from ensemble_kit.recipes import own_parts


@pytest.fixture(scope="module")
def own_package(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(install(tmp_path_factory.mktemp("own")))
        own_parts._offered.cache_clear()
        own_parts._import.cache_clear()
        yield
    own_parts._offered.cache_clear()
    own_parts._import.cache_clear()
