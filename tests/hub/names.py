"""The name under which the tests release their run."""
NAME = 'coatnet_pico_64.colours'
