"""What a training run did: redundancy profiles, HTML reports, comparisons of runs."""
