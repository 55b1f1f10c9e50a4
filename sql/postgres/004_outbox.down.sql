DROP TABLE saga.outbox;
