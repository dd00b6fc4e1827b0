from calm_core.scaling.laws import JointLaw

LAW = JointLaw(
    floor=0.9, a=0.02, alpha=0.3, b=0.03, beta=0.2, k_exponent=0.4, n_reference=1e6, d_reference=1e8
)  # what is lost of Brier-1
