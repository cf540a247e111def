"""Who answers, be it teacher, student or judge."""
