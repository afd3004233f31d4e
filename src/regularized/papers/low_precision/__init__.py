"""Low-Precision Training of Large Language Models: Methods, Challenges, and Opportunities: card."""
