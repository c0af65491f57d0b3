# SPDX-License-Identifier: Apache-2.0
"""The prior: its protocol, the diffusion operator, noise, samplers and packages."""
