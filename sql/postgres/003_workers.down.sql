DROP TABLE saga.workers;
