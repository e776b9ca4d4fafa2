"""Public data as streams of impressions: Complete Journey, from a package, and TaobaoAd, from files of your own."""
