"""What an error at a sampling step is worth: weights that were tried beside equal ones."""

from collections.abc import Sequence

import numpy as np

from tdc_ray.diffusion.schedule import FloatArray


def sample_weights(
    alphas_cumprod: FloatArray, timesteps: Sequence[int], data_variance: float
) -> FloatArray:
    """Compute what a squared error of epsilon at each sampling step adds to that of the sample.

    In the coordinates ``y = x_t / sqrt(acp)`` and ``sigma = sqrt((1 - acp) / acp)`` a DDIM step
    (arXiv:2010.02502, equation 14) is Euler's, ``y' = y + (sigma' - sigma) epsilon``, so an error
    e of epsilon moves y' by ``(sigma' - sigma) e``. The steps that follow shrink it: for Gaussian
    data of variance v the flow from sigma' to 0 multiplies by ``sqrt(v / (v + sigma'^2))``. So::

        weight = (sigma - sigma')^2 v / (v + sigma'^2)

    A difference of two networks' losses is the difference of their squared distances to the best
    prediction, so weighted differences add up to that of the sample as far as errors of different
    steps are independent.

    Args:
        alphas_cumprod: Shape ``(T,)``.
        timesteps: Of the sampling steps, from the noisiest on; a repeated one counts each time.
        data_variance: Mean variance of a pixel over the images, in units of [-1, 1] squared.

    Returns:
        Of each step, in units of the data's squared; after the last step sigma is 0.
    """
    sigma = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)[list(timesteps)]
    following = np.append(sigma[1:], 0.0)
    return np.asarray((sigma - following) ** 2 * data_variance / (data_variance + following**2))


def divergence_weights(alphas_cumprod: FloatArray, timesteps: Sequence[int]) -> FloatArray:
    """Compute what a squared error of epsilon adds to a bound of the samples' divergence.

    With ``sigma = sqrt((1 - acp) / acp)`` the Kullback-Leibler divergence of the samples of the
    stochastic sampler from the data is at most the integral of the squared error over
    ``log(sigma)`` (Girsanov; Song et al., arXiv:2101.09258), so a step from sigma to sigma' has
    ``log(sigma / sigma')``; the last one, to no noise at all, counts as a halving.

    Args:
        alphas_cumprod: Shape ``(T,)``.
        timesteps: Of the sampling steps, without repeats, from the noisiest on.
    """
    sigma = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)[list(timesteps)]
    return np.asarray(np.log(sigma / np.append(sigma[1:], sigma[-1] / 2)))
