"""What a run or an evaluation says to people: cards, the Hub, tables, plots, pages."""
