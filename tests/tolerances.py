# SPDX-License-Identifier: Apache-2.0
"""The tolerances of the suite, one per dtype, each with its derivation.

Raising a value needs a reason in CHANGELOG.md.
"""

import jax.numpy as jnp
import numpy as np

# Attention is a convex combination of values of size about 1, so its absolute error is about its
# relative one. The error of a float32 score of head_dim <= 256 terms of size <= about 6 is below
# 256 * 2^-24 * 6 = 9e-5 in the worst case and its square root, 6e-6, in the typical one; exp passes
# it on as a relative error of the weight.
ATTENTION = {
    np.dtype(jnp.float32): 2e-5,
    # Inputs are equal in both; only the output is rounded, to 8 bits of mantissa: 2^-9 * 4.
    np.dtype(jnp.bfloat16): 2e-2,
    # Likewise with 11 bits.
    np.dtype(jnp.float16): 3e-3,
}

# Logits and log-probabilities of tiny float32 models beside another float32 implementation: a few
# hundred additions per layer, each 2^-24 relative, on logits of size about 10. Recorded models are
# 2e-5 apart at most, as far as float32 is from float64 where they were recorded.
LOGPROB = 1e-4
