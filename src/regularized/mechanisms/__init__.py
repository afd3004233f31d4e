"""What several techniques share and nobody sells well. The lowest storey: it imports torch and nothing of ours."""
